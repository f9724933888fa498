"""A teacher's rows for a whole corpus, in Parquet: written once, checked, read by every epoch."""
