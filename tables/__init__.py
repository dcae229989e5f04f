"""Tables: one file per paper, a function per table; `render` writes them, `layout` builds what they share."""
