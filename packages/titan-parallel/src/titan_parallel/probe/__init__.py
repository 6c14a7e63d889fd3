"""A one-off probe of what parts of a model do: are they token-wise?"""
