"""Figures: one file per paper, a function per figure; `style` holds the shared look and the writer."""
