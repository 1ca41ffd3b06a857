"""The page: reads run folders, never imports the trainer."""
