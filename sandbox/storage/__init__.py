"""Cloud Storage: buckets with their policies, and objects with their generations."""
