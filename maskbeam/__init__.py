"""maskbeam: label image datasets with SAM."""
