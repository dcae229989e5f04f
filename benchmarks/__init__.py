"""Images per CPU-second of each stage, against the usual way and against the NAD authors' own code."""
