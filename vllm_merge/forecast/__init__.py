# SPDX-License-Identifier: Apache-2.0
"""What a plan would do, before it is run: the energy its rank keeps, how long it takes, and what to be careful about."""
