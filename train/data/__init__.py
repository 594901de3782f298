"""Data sets: from prepared records to batches."""
