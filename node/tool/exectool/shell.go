package exectool

// Shell is what runs the command of tool.shell.
const Shell = "/bin/sh"

// ShellDescription is the description of tool.shell for the agent.
const ShellDescription = "Run a command line with /bin/sh -c. Denied unless the policy allows it."

// NewShell makes tool.shell: one param, command, given to /bin/sh -c. cfg gives
// the environment, directory and limits; its Argv, Params and Stdin are set
// here.
func NewShell(cfg Config) (*Tool, error) {
	cfg.Argv = []string{Shell, "-c", "--", "{command}"}
	cfg.Params = map[string]Param{"command": {Description: "the command line", MaxLength: 65536}}
	cfg.Stdin = ""
	return New(cfg)
}
