# SPDX-License-Identifier: Apache-2.0
"""Statistics of experiments that stay true however often one looks: arrays and numbers in, numbers out.

One idea a file. `sums` and `estimate`: what units leave behind, and ratios of it. `sequence`: intervals that hold at all times at
once. `proportion`, `quantile`, `imbalance`, `cuped`, `correction`, `power`: what else is needed. `comparison` puts them together.
"""
