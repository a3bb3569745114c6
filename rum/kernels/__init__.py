"""One recurrence, several speeds: whole-sequence kernels that agree with the cells' own steps."""
