import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
if not os.path.exists("/dev/nvidiactl"):  # before triton is imported: without a GPU its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
if (ROOT / "../shared/tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "../shared/tiktoken"))
