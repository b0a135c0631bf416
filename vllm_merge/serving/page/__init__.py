# SPDX-License-Identifier: Apache-2.0
"""A page in the browser that shows what a server serves, and lets whoever has the admin token steer it."""
