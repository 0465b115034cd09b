"""Images and captions: found, checked, put in buckets, planned into steps, loaded, cached."""
