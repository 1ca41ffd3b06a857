"""From before and after to figures people can trust, and files other programs can read. No torch."""
