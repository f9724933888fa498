"""metis"""
