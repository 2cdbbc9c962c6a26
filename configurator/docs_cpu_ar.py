# The autoregressive twin of docs_cpu: same size, same tokens.
# Hardware: two CPU cores, about three minutes. Expect about 1.96 bits/byte.

from configurator.docs_cpu import *

run_dir = "runs/docs_cpu_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
