"""Batch jobs: files of requests, answered below what people wait for."""
