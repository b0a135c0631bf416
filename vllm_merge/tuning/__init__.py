# SPDX-License-Identifier: Apache-2.0
"""What learns a recipe from data: prompts, objectives, learners, and the plain recipe that they leave behind."""
