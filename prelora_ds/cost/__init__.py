"""Predictions of what a step costs on a machine: bytes, operations, communication and time.

Nothing here runs a model.
"""
