"""Writers: the canonical form, and exports for other programs."""
