"""Servers, worker and deployments of a store: `up`, `down`, `status`, `doctor`."""
