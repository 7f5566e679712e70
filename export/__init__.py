"""Export of FROZEN programs and parity checks; import as `diffcr_compile.export`."""
