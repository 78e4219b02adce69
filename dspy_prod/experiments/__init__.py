"""Experiments on live traffic: who gets which variant, and what is known of it."""
