# The autoregressive twin of quickstart: same network, same tokens. It reads them five times, and without more
# weight decay it would know some by heart in the end.
# Hardware: two CPU cores, about three minutes. Expect about 1.69 bits/byte, 1.67 with averaged weights.

from configurator.quickstart import *

run_dir = "runs/quickstart_ar"
objective = "ar"
schedule = "linear"  # AR has no noise; this is the default
weight_decay = 0.4
