"""Asking a served teacher: bounded, patient, cached, ahead of time, and counted."""
