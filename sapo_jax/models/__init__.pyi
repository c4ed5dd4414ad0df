from .attention import KVCache as KVCache
from .policy import Policy as Policy
from .policy import make_policy as make_policy
from .qwen3 import Forward as Forward
from .qwen3 import Qwen3 as Qwen3
