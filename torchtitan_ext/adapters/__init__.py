"""The losses in other people's models and trainers. Each adapter imports its library, which an extra installs."""
