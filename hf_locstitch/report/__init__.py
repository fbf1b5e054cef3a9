"""What people see of a merge: model card, figures, the upload to the Hub."""
