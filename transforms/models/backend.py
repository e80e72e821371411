"""The only place that knows which Keras backend runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras


def compile_for_backend(function: Callable[..., Any], weights: Any) -> Callable[..., Any]:
    """Compiles a function of weights and tensors with XLA and binds the weights. The only place that knows the backend.

    The weights stay arguments of the compiled program in any case; as constants they would be compiled into it.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow

        # A function's captured tensors cost less in every call than its arguments: 2 ms for the decoder's. TensorFlow
        # counts retracing by the code object, which all programs made here share, but not by that of a partial: two
        # models in a process are no reason to warn.
        program = partial(lambda *tensors: function(weights, *tensors))
        return _first_call_alone(tensorflow.function(program, jit_compile=True))
    if backend == "jax":
        import jax

        if jax.config.jax_compilation_cache_dir is None:  # the next process need not compile again
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "maskbeam" / "jax"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        return _first_call_alone(partial(jax.jit(function), weights))
    raise ValueError(f"KERAS_BACKEND must be tensorflow or jax, got {backend}")


class Programs:
    """A function of weights and tensors for which shapes vary: one program for each, compiled at its first call."""

    def __init__(self, function: Callable[..., Any], weights: Any) -> None:
        self._function = function
        self._weights = weights
        self._compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def of(self, *shape: int) -> Callable[..., Any]:
        """The program for tensors of these shapes, given by the numbers that vary."""
        with self._lock:
            if shape not in self._compiled:
                self._compiled[shape] = compile_for_backend(self._function, self._weights)
            return self._compiled[shape]


def _first_call_alone(program: Callable[..., Any]) -> Callable[..., Any]:
    """The first call compiles: other threads wait for it, instead of compiling the same."""
    lock, compiled = threading.Lock(), threading.Event()

    def call(*tensors: Any) -> Any:
        if compiled.is_set():
            return program(*tensors)
        with lock:
            result = program(*tensors)
            compiled.set()
            return result

    return call


def runs_on_cpu() -> bool:
    """Whether the backend found no accelerator."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        return not tensorflow.config.list_physical_devices("GPU")
    import jax

    return bool(jax.default_backend() == "cpu")
