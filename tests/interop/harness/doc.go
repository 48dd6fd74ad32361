// Package harness starts proxy-nsmgr agents as processes on loopback and real Network Service Mesh
// chains around them.
//
// Every agent, and every DNS server, has a loopback address of its own (127.0.0.0/8), so that each
// serves the ports that it would serve in the field and nothing has to be negotiated. What a test
// starts ends with it: processes are sent SIGTERM and must leave with exit code 0 and without an
// ERROR in their log, which is shown when the test fails.
package harness

import (
	"io"
	stdlog "log"

	"github.com/sirupsen/logrus"
)

// The chains' own logs are many lines for each Request, and of no use without tracing.
func init() {
	logrus.SetOutput(io.Discard)
	stdlog.SetOutput(io.Discard)
}
