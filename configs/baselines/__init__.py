"""Rivals of guided training, each as a phase beside a plain control."""
