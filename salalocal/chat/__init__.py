"""The loop of questions and answers, slash commands and one-shot questions; it draws through the ChatView protocol."""
