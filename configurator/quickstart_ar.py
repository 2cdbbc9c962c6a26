# The autoregressive twin of quickstart: same network, same tokens; in the end it knows some of them by heart.
# Hardware: two CPU cores, about three minutes. Expect about 1.75 bits/byte, 1.73 with averaged weights.

from configurator.quickstart import *

run_dir = "runs/quickstart_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
