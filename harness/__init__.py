"""rerank-harness: a benchmark and leaderboard harness for LLM rerankers."""

__version__ = "0.1.0"
