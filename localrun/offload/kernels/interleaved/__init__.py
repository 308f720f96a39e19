"""Matrices interleaved by groups of 16 rows for 512-bit vector code: layouts, packing, and row kernels of all fast types."""
