"""Images with masks: files, masks, splits and samples."""
