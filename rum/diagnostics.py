"""Statistics of recurrent states."""
