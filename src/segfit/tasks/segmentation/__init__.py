"""Semantic segmentation: images and masks in, a class for each pixel out."""
