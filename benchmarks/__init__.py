"""Speed against what people would pick instead, measured in one go. Run by hand; never timed inside a test."""
