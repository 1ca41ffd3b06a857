"""Old knowledge: packs of probes, their answers before and after, and how they are scored."""
