# The autoregressive twin of quickstart: same size, same tokens.
# Hardware: two CPU cores, about three minutes. Expect about 1.96 bits/byte.

from configurator.quickstart import *

run_dir = "runs/quickstart_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
