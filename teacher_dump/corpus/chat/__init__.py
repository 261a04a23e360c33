"""Conversations under a chat template: their tokens, and which of them are the assistant's.

`messages` judges a row's messages and gives them the forms that templates ask for; `fields` names the words in them; `marks`
renders them with marks around the words; `template` makes sure that no words are lost; `turns` finds where an assistant's turn
begins and ends. No file type and no tokenization of plain text belongs here.
"""
