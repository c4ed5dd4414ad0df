from .attention import KVCache
from .policy import Policy, make_policy
from .qwen3 import Forward, Qwen3

__all__ = ["Forward", "KVCache", "Policy", "Qwen3", "make_policy"]
