# SPDX-License-Identifier: Apache-2.0
"""What is done before adapters are trained so that they may merge better afterwards: the OSRM initialisation."""
