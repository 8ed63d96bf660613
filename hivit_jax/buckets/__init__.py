"""Workdirs in buckets of Google Cloud Storage and Amazon S3, or of servers that speak like them."""
