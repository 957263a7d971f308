"""The demonstration: edits of the demo model, their scores, and the page that shows them."""
