# The autoregressive twin of quickstart: same size, same tokens.
# Hardware: two CPU cores, about TODO. Expect TODO bits/byte.

from configurator.quickstart import *

run_dir = "runs/quickstart_ar"
objective = "ar"
