// Package wire records what crosses the boundary of our agents, so that a change of the code that is
// meant to leave the wire alone can be shown to do so.
//
// A [Tap] is a transparent gRPC proxy in front of one party: it passes calls on as they are and keeps
// a copy of their metadata, messages and status. Between any two parties of a scene there is one, also
// between two of our agents. A [Recording] collects the calls of all taps of a scene, in steps, and
// renders them as text in which all that differs from run to run (tokens, times, drawn ids, addresses)
// is replaced by what it stands for. That text is compared with a file in testdata.
//
// A difference is either a fault or a deliberate change of the wire. After a deliberate one the files
// are written anew by running the tests with UPDATE_GOLDEN=1, and the difference is reviewed.
package wire
