"""One HTTP server in front of every run: OpenAI's endpoints, a few more, and a page. What it computes is in sample/."""
