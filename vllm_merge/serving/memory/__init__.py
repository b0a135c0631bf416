# SPDX-License-Identifier: Apache-2.0
"""Where artifacts and sources lie: slots, the cache, the tiers below it, and the memory of a merge."""
