"""What every GPU op's call goes through, whatever it computes."""
